"""A set of pairs: what is learned, its file and those of other programs, its pictures, its similarity and phases."""

from utils.sets.export import check_new_folder, export_released, export_sets
from utils.sets.folders import (
    LEFT_OUT,
    shown_command,
    shown_path,
    shown_text_encoder,
    with_text_encoder,
    without_paths,
)
from utils.sets.pairs import BATCH_ORDERS, Pairs, draw_batches, phase_rows, rows_on
from utils.sets.pictures import before_and_after, fit_images, picture_grid, share_out_of_range
from utils.sets.released import is_released
from utils.sets.similarity import SIM_TYPES, initial_similarity, similarity_matrix
from utils.sets.synset import MADE_TEXTS, REAL_PAIRS, SynSet, as_synset, load_synset, save_synset
