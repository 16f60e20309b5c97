"""What an iteration leaves in the log."""

import statistics
from collections.abc import Sequence

from utils.matching.learner import PairLearner
from utils.student import Matching, Segment


def iteration_numbers(
    matching: Matching, learner: PairLearner, segments: Sequence[Segment], losses: dict[str, float]
) -> dict[str, float]:
    """Losses, rates after the step and gradient norms by their names in metrics.jsonl.

    Args:
        matching: its gradient as it was before `Guard.limit`.
        segments: that the iteration matched.
        losses: by image encoder, of those that took part; those of several are in the log too.
    """
    several = learner.pairs.syn_lr_img.ndim > 0
    student_losses = matching.student_losses.tolist()
    return {
        "Grand_Loss": matching.loss.item(),
        "Image_Loss": matching.image_loss.item(),
        "Text_Loss": matching.text_loss.item(),
        "Start_Epoch": statistics.mean(segment.start_epoch for segment in segments),
        "Student_Loss_First": student_losses[0],
        "Student_Loss_Last": student_losses[-1],
        "Synthetic_LR_Image": learner.pairs.syn_lr_img.mean().item(),
        "Synthetic_LR_Text": learner.pairs.syn_lr_txt.mean().item(),
        "Grad_Norm_Image": matching.gradient.image_syn.norm().item(),
        "Grad_Norm_Text": matching.gradient.text_syn.norm().item(),
        "Limited_Gradients": learner.guard.limited,
        **({f"Grand_Loss/{name}": loss for name, loss in losses.items()} if several else {}),
    }
