"""The student: its loss, its steps, and the gradient of the matching loss back through them."""

from utils.student.gradient import (
    Segment,
    check_shares,
    matching_gradient,
    mean_matching,
    mean_over_encoders,
    prepare,
    pulled_back,
    to_device,
)
from utils.student.loss import StudentLoss
from utils.student.steps import LEAST, Keep, graph_bytes
from utils.student.sweep import Matching, matching_loss
