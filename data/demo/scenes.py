"""Scenes of coloured shapes for the data set "demo": what they are made of, their pictures and captions.

As with photographs, the flip of the train transform makes "left" and "right" unreliable in training.
"""

import math
import random
from typing import NamedTuple

from PIL import Image, ImageDraw

# Each thing with the words for it; words of two different things never coincide.
SHAPES = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "heart": ("heart",),
}
COLOURS = {
    (214, 39, 40): ("red",),
    (44, 150, 60): ("green",),
    (35, 80, 210): ("blue",),
    (250, 215, 20): ("yellow",),
    (250, 130, 20): ("orange",),
    (130, 50, 170): ("purple", "violet"),
    (250, 140, 200): ("pink",),
    (120, 70, 30): ("brown",),
}
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
BACKGROUNDS = {
    (255, 255, 255): ("white",),
    (150, 150, 150): ("grey", "gray"),
    (25, 25, 25): ("black", "dark"),
    (222, 203, 164): ("sandy", "beige"),
}
PATTERNS = {"plain": ("",), "stripes": ("striped",), "dots": ("dotted", "spotted")}
RELATIONS = {  # said from the first object to the second, and from the second to the first
    "left": (("to the left of", "left of"), ("to the right of", "right of")),
    "above": (("above", "over"), ("below", "under", "beneath")),
    "inside": (("inside", "in the middle of", "within"), ("around", "surrounding", "behind")),
}
VAGUE_RELATIONS = {
    "left": ("next to", "beside", "and"),
    "above": ("near", "with", "and"),
    "inside": ("with", "and"),
}
OPENINGS = ("", "", "", "a picture of", "a drawing of", "there is", "we see", "this shows")
VERBS = ("", "is")
THIRD_THING = ("and {} in the corner", "with {} in a corner", "and {} at the side")
ON_BACKGROUND = ("on a {} background", "in front of a {} background", "against a {} wall")
VAGUE_SHAPES = ("shape", "thing", "object")
ARTICLES = ("a", "an")

RADII = {"small": (0.08, 0.10), "large": (0.16, 0.19)}  # shares of the picture's side, as all lengths here
AROUND_RADIUS = (0.32, 0.36)  # of the large thing that another one is inside of
CENTRES = {
    "left": ((0.27, 0.5), (0.73, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "inside": ((0.5, 0.5),) * 2,
}
CORNERS = ((0.12, 0.12), (0.12, 0.88), (0.88, 0.12), (0.88, 0.88))
SUPERSAMPLING = 4  # draw larger, then average: smooth edges


class Thing(NamedTuple):
    """One object of a scene, by its keys in SHAPES, COLOURS and SIZES."""

    shape: str
    colour: tuple[int, int, int]
    size: str


class Scene(NamedTuple):
    """The full description of a picture. `things`: two in `relation`, then perhaps one in a corner."""

    things: tuple[Thing, ...]
    relation: str
    background: tuple[int, int, int]
    pattern: str


def demo_words() -> list[str]:
    """Every word the captions can contain once they are cleaned, sorted."""
    tables = [SHAPES, COLOURS, SIZES, BACKGROUNDS, PATTERNS, VAGUE_RELATIONS]
    phrases = [phrase for table in tables for words in table.values() for phrase in words]
    phrases += [phrase for both_ways in RELATIONS.values() for way in both_ways for phrase in way]
    phrases += [*OPENINGS, *VERBS, *THIRD_THING, *ON_BACKGROUND, *VAGUE_SHAPES, *ARTICLES]
    return sorted({word for phrase in phrases for word in phrase.replace("{}", "").split()})


def draw_scene(rng: random.Random) -> Scene:
    """A random scene; its objects differ in colour."""
    colours = rng.sample(list(COLOURS), 3)
    things = [Thing(rng.choice(list(SHAPES)), colour, rng.choice(list(SIZES))) for colour in colours]
    relation = rng.choice(list(RELATIONS))
    if relation == "inside":
        things[:2] = things[0]._replace(size="small"), things[1]._replace(size="large")
    things[2] = things[2]._replace(size="small")
    count = 3 if rng.random() < 0.25 else 2
    pattern = rng.choice(["plain", "plain", "stripes", "dots"])
    return Scene(tuple(things[:count]), relation, rng.choice(list(BACKGROUNDS)), pattern)


def caption_scene(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions in random order. One tells everything, the others leave out what people leave out."""
    captions = [_say_scene(scene, rng, complete=i == 0) for i in range(5)]
    rng.shuffle(captions)
    return captions


def _say_scene(scene, rng, complete):
    def is_told(share):
        return complete or rng.random() < share

    swapped = rng.random() < 0.5
    first, second, *rest = [_say_thing(thing, rng, is_told) for thing in scene.things]
    if swapped:
        first, second = second, first
    opening = rng.choice(OPENINGS)
    if is_told(0.7):
        relation = rng.choice(RELATIONS[scene.relation][swapped])
        verb = "" if opening else rng.choice(VERBS)
    else:
        relation, verb = rng.choice(VAGUE_RELATIONS[scene.relation]), ""
    parts = [opening, first, verb, relation, second]
    if rest and is_told(0.7):
        parts.append(rng.choice(THIRD_THING).format(rest[0]))
    if is_told(0.6):
        parts.append(rng.choice(ON_BACKGROUND).format(_say_background(scene, rng, is_told)))
    caption = " ".join(part for part in parts if part)
    return f"{caption[0].upper()}{caption[1:]}." if rng.random() < 0.5 else caption


def _say_thing(thing, rng, is_told):
    words = [rng.choice(SIZES[thing.size])] if is_told(0.7) else []
    words += [rng.choice(COLOURS[thing.colour])] if is_told(0.9) else []
    words += [rng.choice(SHAPES[thing.shape] if is_told(0.9) else VAGUE_SHAPES)]
    return " ".join([ARTICLES[words[0][0] in "aeiou"], *words])


def _say_background(scene, rng, is_told):
    colour = rng.choice(BACKGROUNDS[scene.background])
    pattern = rng.choice(PATTERNS[scene.pattern])
    return f"{colour} {pattern}" if pattern and is_told(0.8) else colour


def paint_scene(scene: Scene, image_size: int, rng: random.Random) -> Image.Image:
    """RGB picture of `image_size` x `image_size` pixels; place, size, turn and colours vary a little."""
    side = image_size * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(canvas)
    _paint_pattern(draw, scene, side, rng)
    centres = [*CENTRES[scene.relation], rng.choice(CORNERS)]
    order = (1, 0, 2) if scene.relation == "inside" else (0, 1, 2)  # the surrounding thing goes below
    for i in order[: len(scene.things)]:
        thing = scene.things[i]
        radius = rng.uniform(*(AROUND_RADIUS if (scene.relation, i) == ("inside", 1) else RADII[thing.size]))
        x, y = (side * (centre + rng.uniform(-0.025, 0.025)) for centre in centres[i])
        turn = math.radians(rng.uniform(-15, 15))
        cos, sin = side * radius * math.cos(turn), side * radius * math.sin(turn)
        outline = OUTLINES[thing.shape]
        points = [(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in outline]
        draw.polygon(points, fill=tuple(c + rng.randint(-12, 5) for c in thing.colour))
    return canvas.reduce(SUPERSAMPLING)


def _paint_pattern(draw, scene, side, rng):
    shift = 50 if max(scene.background) < 100 else -45
    tone = tuple(channel + shift for channel in scene.background)
    step = side / 8
    left, top = (rng.random() - 1) * step, (rng.random() - 1) * step
    if scene.pattern == "stripes":
        upright = rng.random() < 0.5
        for k in range(10):
            low, high = left + k * step, left + (k + 0.4) * step
            draw.rectangle((low, 0, high, side) if upright else (0, low, side, high), fill=tone)
    elif scene.pattern == "dots":
        for k in range(100):
            x, y = left + k % 10 * step, top + k // 10 * step
            draw.ellipse((x, y, x + 0.45 * step, y + 0.45 * step), fill=tone)


def _ring(count, *radii):
    """`count` points around the origin, the first on top, at the given radii in turn."""
    angles = [2 * math.pi * i / count for i in range(count)]
    return [
        (radii[i % len(radii)] * math.sin(angle), -radii[i % len(radii)] * math.cos(angle))
        for i, angle in enumerate(angles)
    ]


def _heart(t):
    height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3 * 1.05, -(height + 2) / 15


_CROSS_TIP = [(1.05, 0.37), (1.05, -0.37), (0.37, -0.37)]
_AXES = [(1, 0), (0, 1), (-1, 0), (0, -1)]
OUTLINES = {  # around the origin, of about the same area as the unit circle's
    "circle": _ring(40, 1.0),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": _ring(3, 1.2),
    "star": _ring(10, 1.2, 0.55),
    "cross": [(x * u + y * v, x * v - y * u) for u, v in _AXES for x, y in _CROSS_TIP],
    "heart": [_heart(2 * math.pi * i / 40) for i in range(40)],
}
