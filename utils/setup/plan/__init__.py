"""What --plan prints: sizes, memory and hours of a run, which is not begun."""

from utils.setup.plan.scripts import plan_coreset, plan_distillation, plan_experts
