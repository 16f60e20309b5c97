"""The student: its loss, its steps, and the gradient of the matching loss back through them."""

from utils.student.loss import StudentLoss
from utils.student.segment import Segment, prepare, to_device
from utils.student.sweep import Matching, check_shares, matching_gradient, matching_loss, mean_matching
