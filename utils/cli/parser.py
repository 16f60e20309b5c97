"""Command lines: titles of --help, booleans, flags kept for compatibility, recipes, types of values."""

import argparse
import ast
import difflib
import json
import math
import re
import sys

from data.annotations import STEMS
from networks.image_encoder import plain_name
from utils import ranks
from utils.cli.recipes import OUTER_RATES, RECIPES, recipe_defaults
from utils.matching import FIT

# The groups of flags in --help, in their order; a script shows those that it has.
TITLES = "data", "encoders", "recipe", "pairs", "experts", "student", "outer loop", "evaluation", "output", "machine"
DOWNLOADED_INTO = "./Flickr30k/ann_file/"  # the annotations of data sets that are downloaded
# Accepted by the released scripts and used by none of them.
UNUSED_FLAGS = (
    *("basis", "canvas_samples", "canvas_size", "data_path", "distill", "dsa", "dsa_strategy", "eval_mode"),
    *("force_save", "grounding", "ipc", "k_test", "load_all", "load_npy", "margin", "max_violation", "measure"),
    *("n_basis", "optimize", "recursive", "save_interval", "text_trainable", "texture", "transfer", "zca"),
)
# Flags of some scripts that the others accept without effect, so that one set of flags can be given to all of them.
FLAGS_OF_OTHERS = "batch_size_train", "batch_train", "num_workers"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that are None, numbers as N, and in the usage what must be given alone."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)

    def add_usage(self, usage, actions, groups, prefix=None):
        required = [f" {a.option_strings[0]} {a.metavar or a.dest.upper()}" for a in actions if a.required]
        super().add_usage(f"%(prog)s{''.join(required)} [--FLAG VALUE ...]", actions, groups, prefix)

    def _get_default_metavar_for_optional(self, action):
        return "N" if action.type else super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Section:
    """The flags under one title of --help; `add_argument` is argparse's."""

    def __init__(self, group):
        self.group, self.add_argument = group, group.add_argument

    def add_bool(self, name: str, default: bool, help: str) -> None:
        """--name, --name True, --name=false, --no_name."""
        add = self.group.add_mutually_exclusive_group().add_argument
        add(f"--{name}", nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help)
        add(f"--no_{name}", dest=name, action="store_false", default=default, help=argparse.SUPPRESS)


class Parser(argparse.ArgumentParser):
    """Flags by their full names, in sections; an error is one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self._sections = {title: Section(self.add_argument_group(title)) for title in TITLES}

    def section(self, title: str) -> Section:
        """Where flags under one of `TITLES` are added; argparse leaves a title without flags out of --help."""
        return self._sections[title]

    def error(self, message):
        sys.exit(ranks.fail(f"{self.prog}: error: {message}", 2))

    def parse(self, argv=None, defaults=None) -> argparse.Namespace:
        """Parses the command line; exits with code 2 and one line where it is wrong.

        Args:
            defaults: function from what was parsed to a dict of other defaults; then it is parsed again.
        """
        argv = sys.argv[1:] if argv is None else list(argv)
        self._set_recipe(argv)
        accepted = *UNUSED_FLAGS, *FLAGS_OF_OTHERS
        unused = [name for name in accepted if f"--{name}" not in self._option_string_actions]
        for name in unused:
            self.add_argument(f"--{name}", nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        args, unknown = self.parse_known_args(argv)
        if defaults and not unknown:
            self.set_defaults(**defaults(args))
            args = self.parse_args(argv)
        if unknown:
            self.error(f"unknown argument {unknown[0]}{self._nearest(unknown[0])}")
        given = [name for name in unused if name in args]
        if given:
            print(f"warning: without effect in {self.prog}: {' '.join('--' + name for name in given)}")
        for name in given:
            delattr(args, name)
        if "image_kwargs" in args:
            args.image_kwargs = dict(args.image_kwargs or [])
        if "ann_root" in args and args.ann_root is None:
            args.ann_root = DOWNLOADED_INTO if args.dataset in STEMS else args.image_root
        if "lora_rank" in args:
            self._complete_lora(args)
        if "optimizer" in args:
            self._complete_outer_rates(args)
        return args

    def misfit(self, name: str, value) -> str | None:
        """What keeps a saved setting from being a value of its flag, None if nothing does; for lists, of each part."""
        action = next(action for action in self._actions if action.dest == name)
        if isinstance(value, list) and action.nargs == "+":
            return next((problem for part in value if (problem := self.misfit(name, part))), None)
        kind = {bool: boolean, dict: key_value}.get(type(value))
        takes_text = action.type in (None, plain_name)
        if takes_text != isinstance(value, str) or (kind and kind is not action.type):
            return "is of another type"
        if takes_text and not value.isprintable():
            return "is no printable text"
        if action.type is boolean or action.type is key_value:
            return None if kind else "is of another type"
        try:
            self._check_value(action, value if takes_text else action.type(str(value)))
        except (argparse.ArgumentTypeError, argparse.ArgumentError) as error:
            return str(error).rpartition(": ")[2]
        return None

    def _complete_lora(self, args):
        defaults = {"lora_alpha": float(args.lora_rank or 0), "lora_layers": "attn", "lora_train": "none"}
        for name, default in defaults.items():
            if args.lora_rank is None and getattr(args, name) is not None:
                self.error(f"--{name} is without effect without --lora_rank")
            if args.lora_rank is not None and getattr(args, name) is None:
                setattr(args, name, default)

    def _complete_outer_rates(self, args):
        for name, default in OUTER_RATES[args.optimizer].items():
            if getattr(args, name) is None:
                setattr(args, name, default)

    def _set_recipe(self, argv):
        """Defaults of the recipe and of the demo data, which are named on the command line.

        A recipe's outer rates are those of its optimizer; another one has its own.
        """
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--dataset", nargs="?")
        early.add_argument("--recipe", nargs="?")
        early.add_argument("--optimizer", nargs="?")
        named = early.parse_known_args(argv)[0]
        known = {action.dest for action in self._actions}
        if named.recipe in (None, *RECIPES):  # another one is refused when all is parsed
            defaults = recipe_defaults(self.prog, named.dataset, named.recipe)
            if named.optimizer not in (None, defaults.get("optimizer", self.get_default("optimizer"))):
                defaults = {name: value for name, value in defaults.items() if name not in OUTER_RATES["sgd"]}
            # evaluate.py's recipe is the data set's own; loader processes are for those who train experts.
            if unknown := defaults.keys() - known - {"recipe", "num_workers"}:
                raise ValueError(f"a recipe sets {', '.join(sorted(unknown))}, which {self.prog} has no flag for")
            self.set_defaults(**{name: value for name, value in defaults.items() if name in known})

    def _nearest(self, flag):
        visible = [o for a in self._actions if a.help != argparse.SUPPRESS for o in a.option_strings]
        found = difflib.get_close_matches(flag.split("=")[0], visible, n=1)
        return f"; did you mean {found[0]}?" if found else "; see --help"


def boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")


def number(kind, least=None, above=None, below=None, most=None):
    """An argparse type: int or float within least <= x, above < x, x < below, x <= most."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{text}' is not {name}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} must be above {above}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}")
        if below is not None and value >= below:
            raise argparse.ArgumentTypeError(f"{text} must be below {below}")
        return value

    return parse


count = number(int, least=1)
rate = number(float, least=0)
positive = number(float, above=0)


def positive_or_fit(text: str) -> float | str:
    try:
        return text if text == FIT else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; give a number above 0 or {FIT}") from None


def license_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no identifier of a licence such as cc-by-4.0 or other")
    return text


def key_value(text: str) -> tuple:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"'{text}' is not key=value")
    try:
        # By way of JSON, as saved settings are: a tuple becomes a list here too.
        return key, json.loads(json.dumps(ast.literal_eval(value)))
    except (ValueError, SyntaxError, TypeError):
        return key, value
