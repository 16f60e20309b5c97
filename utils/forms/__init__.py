"""Forms in which pictures are held and seen: pixels, levels of a pyramid, mixtures of real pictures; views of them."""

from utils.forms.augmentation import OPERATIONS, USUAL, view, view_normalised
from utils.forms.mixtures import Mixture, as_words, mix, read_words
from utils.forms.pixels import PictureForm
from utils.forms.pyramid import Pyramid
