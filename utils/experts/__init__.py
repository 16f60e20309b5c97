"""Experts: their trajectories on disk, one file of snapshots per expert."""

from utils.experts.locks import ExpertLocks, clear_stale
from utils.experts.shortcut import Shortcut
from utils.experts.snapshots import TYPES as SNAPSHOT_TYPES
from utils.experts.trajectory import (
    LORA,
    Trajectory,
    buffer_folder,
    check_epochs,
    check_loss,
    expert_path,
    find_trajectories,
    save_trajectory,
    stored_lora,
)
