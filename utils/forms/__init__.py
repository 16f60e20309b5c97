"""Forms in which pictures and texts are held and seen: pixels, a pyramid, mixtures of real ones; views of pictures."""

from utils.forms.augmentation import OPERATIONS, USUAL, one_of_each, view, view_normalised, with_views
from utils.forms.features import PairFeatures, pair_features
from utils.forms.mixtures import Mixture, as_words, mix, read_words
from utils.forms.pixels import PictureForm
from utils.forms.pyramid import Pyramid
from utils.forms.sentences import Sentences, mix_terms
