"""What a set of pairs is worth: networks trained on it and their recall; real pairs chosen to compare with."""

from utils.scoring.coresets import (
    ForgettingCounter,
    check_num_queries,
    herding,
    highest,
    kcenter,
    kmeans,
    prototypes,
    random_rows,
)
from utils.scoring.evaluation import (
    BEST_LOOK,
    TEST_SEED,
    VALIDATION_SEED,
    Evaluation,
    embed_batches,
    evaluate_synset,
    look_epochs,
)
from utils.scoring.features import EmbedLoader, embed_images, embed_views, embedded_once, feature_cache_path
from utils.scoring.retrieval import (
    evaluate_retrieval,
    nearest_captions,
    nearest_with_cosine,
    retrieval_features,
)
from utils.scoring.tables import (
    ALL_DATA,
    as_numbers,
    best_look_name,
    compare_rows,
    counted,
    encoder_table,
    markdown_table,
    mean_and_std,
    mean_text,
    rates_text,
    recall_table,
    row_of_set,
)
from utils.scoring.text_map import TextMap, choose_map
from utils.scoring.training import NonFiniteLoss, device_batches, make_optimizer, train_epoch, train_epochs
from utils.scoring.tuning import Rates, choose_rates
