"""Command lines: the parser, the flags, and one-line errors."""

from utils.cli.distillation import add_distillation_flags
from utils.cli.errors import one_line_errors
from utils.cli.parser import (
    FLAGS_OF_OTHERS,
    TITLES,
    UNUSED_FLAGS,
    Parser,
    count,
    key_value,
    license_name,
    number,
    positive,
    rate,
)
from utils.cli.shared import (
    add_data_flags,
    add_evaluation_flags,
    add_expert_flags,
    add_log_flags,
    add_network_flags,
    add_plan_flag,
    add_recipe_flag,
    add_run_flags,
)
