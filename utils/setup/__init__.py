"""From a command line to data, models and pairs: with the scripts and utils/cli, the only place that reads `args`."""

from utils.setup.backbones import (
    Backbone,
    args_of_encoders,
    draw_encoders,
    encoder_names,
    mean_share,
    open_backbones,
    settings_of_encoder,
)
from utils.setup.data import (
    Data,
    expert_loader,
    find_split,
    make_text_encoder,
    open_data,
    retrieval_pairs,
)
from utils.setup.dictionary import open_dictionary
from utils.setup.export import export
from utils.setup.first_pairs import encoder_features, first_pairs
from utils.setup.networks import (
    describe_training,
    expert_training,
    find_device,
    lora_of,
    make_evaluation,
    make_factory,
)
from utils.setup.plan import plan_coreset, plan_distillation, plan_experts
from utils.setup.student import Student, make_learner, pairs_of_encoder, seen_pictures
from utils.setup.texts import with_texts
