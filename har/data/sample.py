"""The built-in sample: a small drawn data set in the layout of Kaggle's data.

sample.toml describes what to draw. A point is a complex number in centimetres (x right, y down, 0
at the hip), so that adding moves it, and multiplying turns and scales it.
"""

import cmath
import colorsys
import csv
import math
import tomllib
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw

TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
ACTIONS: dict[str, list[dict[str, Any]]] = TABLES["actions"]  # action to scenes
OVERSAMPLING = 2  # images are drawn larger and then averaged down, for smooth edges
CIRCLE = [cmath.rect(1, math.tau * k / 28) for k in range(29)]
SQUARE = [-0.5 - 0.5j, 0.5 - 0.5j, 0.5 + 0.5j, -0.5 + 0.5j]


class Joint(NamedTuple):
    """A place to draw at, and the factor that turns and scales what is drawn there."""

    place: complex
    tilt: complex


Joints = dict[str, Joint]
Colour = tuple[int, int, int]
Outline = list[complex]
Shapes = Iterator[tuple[Outline, Colour]]  # from back to front


def mix_inks(rng: Generator) -> dict[str, Colour]:
    """Draw a random colour for each ink; "name-" is a darker shade of "name"."""
    rgb = {
        name: colorsys.hsv_to_rgb(*(rng.uniform(*span) / 100 for span in spans))
        for name, spans in TABLES["inks"].items()
    }
    tone = rng.random()  # of skin, from dark to light
    rgb["skin"] = (0.42 + 0.56 * tone, 0.27 + 0.56 * tone, 0.18 + 0.53 * tone)
    rgb["sleeve"], rgb["shin"] = (rgb[str(rng.choice(["skin", of]))] for of in ("top", "legs"))
    rgb |= {name + "-": (0.84 * r, 0.84 * g, 0.84 * b) for name, (r, g, b) in rgb.items()}
    return {name: (int(255 * r), int(255 * g), int(255 * b)) for name, (r, g, b) in rgb.items()}


def _polygons(shape: str, size: list[float], points: Outline, tilt: complex) -> Iterator[Outline]:
    if shape == "poly":
        yield points
    elif shape == "ring":
        for point in points:
            yield from _polygons("line", size[1:], [point + size[0] * z for z in CIRCLE], tilt)
    elif shape == "line":  # a quadrangle for each segment, a disc at each point
        radii = (np.linspace(size[0], size[-1], len(points)) * abs(tilt) / 2).tolist()
        for (a, u), (b, v) in pairwise(zip(points, radii, strict=True)):
            side = 1j * (b - a) / (abs(b - a) or 1)
            yield [a + u * side, b + v * side, b - v * side, a - u * side]
        for point, radius in zip(points, radii, strict=True):
            yield [point + radius * z for z in CIRCLE]
    else:
        unit = {"oval": CIRCLE, "box": SQUARE}[shape]
        unit = [tilt * complex(size[0] * z.real, size[-1] * z.imag) for z in unit]
        yield from ([point + z for z in unit] for point in points)


def prop_shapes(name: str, joints: Joints, inks: dict[str, Colour]) -> Shapes:
    """Yield the shapes of a prop, at the joints that its marks name."""
    for mark in TABLES["props"][name].splitlines():
        shape, ink, size, joint, *offsets = mark.split()
        points = []
        for other, _, offset in (text.rpartition(":") for text in offsets):
            place, tilt = joints[other or joint]
            points.append(place + tilt * complex(*map(float, offset.split(","))))
        for polygon in _polygons(shape, [*map(float, size.split("x"))], points, joints[joint].tilt):
            yield polygon, inks[ink]


def find_joints(person: dict[str, Any], rng: Generator) -> Joints:
    """Place the joints of a person; each angle varies by about 5 degrees."""

    def aim(degrees: float) -> complex:
        angle = math.radians(degrees + rng.normal(0, 5))
        return complex(math.sin(angle), math.cos(angle))

    turn, torso = person["turn"], aim(180 - person["lean"]) * 1j
    neck, tilt = -50j * torso, torso * aim(-person["nod"]) / 1j
    head = neck - 21j * tilt
    face = head + tilt * complex(5.5 * turn, 4 * person["look_down"])
    joints = {"hip": Joint(0j, 1 + 0j), "head": Joint(head, tilt), "face": Joint(face, tilt)}
    joints["chest"] = Joint(neck, torso * (1 - 0.25 * turn))
    arms, legs = TABLES["arms"][person["arms"]], TABLES["legs"][person["legs"]]
    for i, (side, out) in enumerate((("right", 1 - 0.6 * turn), ("left", 0.6 * turn - 1))):
        for names, start, angles, lengths in (
            (("shoulder", "elbow", "hand"), neck + torso * (13 * out + 7j), arms[i], (28, 25)),
            (("thigh", "knee", "foot"), torso * 7 * out, legs[i], (42, 40)),
        ):
            upper, lower = aim(angles[0]), aim(angles[1])
            middle = start + lengths[0] * upper
            end = middle + lengths[1] * lower
            for name, place in zip(names, (start, middle, end), strict=True):
                joints[f"{side}_{name}"] = Joint(place, lower / 1j)
        joints[f"{side}_toe"] = Joint(end + lower / 1j * (11 * turn + 5 * out + 2j), lower / 1j)
    joints["hands"] = Joint((joints["right_hand"].place + joints["left_hand"].place) / 2, 1 + 0j)
    return joints


def _scene_shapes(scene: dict[str, Any], bodies: list[Joints], rng: Generator) -> Shapes:
    """People and props; the arms in front come after all bodies, so that people can hug."""
    inks = [mix_inks(rng) for _ in bodies]
    layers = [(0, name) for name in scene["behind"]]
    near_arms = []
    for i, person in enumerate(scene["people"]):
        hair = f"hair_{rng.choice(TABLES['hair'])}"
        far = ["right_arm"] if person["turn"] > 0.4 else []
        body = (hair + "_behind", *far, "right_leg", "left_leg", "torso", "head", hair)
        layers += [(i, name) for name in (*body, *person["face"])]
        near_arms += [(i, name) for name in ("right_arm", "left_arm") if name not in far]
    layers += near_arms + [(0, name) for name in scene["front"]]
    if scene["sometimes"] and rng.random() < 0.5:
        layers += [(0, name) for name in scene["sometimes"]]
    for i, name in layers:
        x, flip = scene["people"][i]["x"], scene["people"][i]["flip"]
        for outline, colour in prop_shapes(name, bodies[i], inks[i]):
            yield [x - z.conjugate() if flip else x + z for z in outline], colour


def _place_shapes(place: dict[str, Any], view: list[float], floor: float, rng: Generator) -> Shapes:
    """The ground, and a few things on the horizon."""
    horizon = (floor - place["depth"] * rng.uniform(0.7, 1.3)) * 1j
    if "ground" in place:
        ground = [horizon + 999 * z for z in (-1, 1, 1 + 1j, -1 + 1j)]
        yield ground, mix_inks(rng)[place["ground"]]
    for share in rng.permuted([-0.7, -0.45, 0.45, 0.7, 0.1])[: rng.integers(2, 5)].tolist():
        spot = Joint(view[0] + view[2] * share + horizon, complex(rng.uniform(0.8, 1.3)))
        yield from prop_shapes(str(rng.choice(place["things"])), {"spot": spot}, mix_inks(rng))


def draw_action(action: str, rng: Generator) -> Image.Image:
    """Draw a random RGB image of an action, 84x84 to 478x318 pixels."""
    scene = TABLES["scene_defaults"] | ACTIONS[action][rng.integers(len(ACTIONS[action]))]
    scene["people"] = [TABLES["person_defaults"] | person for person in scene["people"]]
    area = 48500 * (rng.uniform(0.2, 2.5) if rng.random() < 0.1 else rng.uniform(0.95, 1.1))
    aspect = rng.choice([1.78, 1.5, 1.5, 1.33, 1.33, 1.0, 0.75])
    width = OVERSAMPLING * int(np.clip((area * aspect) ** 0.5, 84, 478))
    height = OVERSAMPLING * int(np.clip((area / aspect) ** 0.5, 84, 318))
    place = TABLES["places"][rng.choice(scene["places"])]
    inks = mix_inks(rng)
    sides = [[inks[place["backdrop"] + shade]] for shade in rng.permuted(["", "-"])]
    backdrop = Image.fromarray(np.array(sides, np.uint8))
    canvas = backdrop.resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    x, y, across, down = view = TABLES["views"][scene["view"]]
    fit = min(width / across, height / down) * rng.uniform(0.8, 1.12)
    zoom = cmath.rect(fit, rng.normal(0, 0.06))  # turns, and scales from centimetres to pixels
    centre = complex(*rng.normal(0, 0.04, 2)) * math.hypot(across, down) + complex(x, y)
    bodies = [find_joints(person, rng) for person in scene["people"]]
    feet = max(body[foot].place.imag for body in bodies for foot in ("right_foot", "left_foot"))
    around = _place_shapes(place, view, feet + 5 + scene["lift"], rng)
    for outline, colour in chain(around, _scene_shapes(scene, bodies, rng)):
        pixels = [(z - centre) * zoom + complex(width, height) / 2 for z in outline]
        draw.polygon([(z.real, z.imag) for z in pixels], fill=colour)
    return _develop(canvas.reduce(OVERSAMPLING), rng)


def _develop(image: Image.Image, rng: Generator) -> Image.Image:
    """Add uneven light, a colour cast and grain; mirror half of the images."""
    left, right = rng.uniform(0.88, 1.12, 2).tolist()
    light = np.linspace(left, right, image.width, dtype=np.float32)[:, None]
    cast = rng.uniform(0.94, 1.04, 3).astype(np.float32)
    grain = rng.standard_normal((image.height, image.width, 1), np.float32) * rng.uniform(1, 5)
    pixels = (np.asarray(image) * (light * cast) + grain).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def write_sample(
    out: Path,
    per_class: int = 40,
    test_images: int = 60,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write Training_set.csv, train/, Testing_set.csv (without labels) and test/ into `out`.

    `per_class` is the number of training images of each action, at least 2; `progress(1)` is
    called after each image. An image depends only on the seed, the split and its number.
    """
    if per_class < 2 or test_images < 0:
        raise ValueError(f"need per_class >= 2, test_images >= 0: got {per_class}, {test_images}")
    names = list(ACTIONS)
    for split, title, count in ((0, "Train", per_class * len(names)), (1, "Test", test_images)):
        folder = out / title.lower()
        folder.mkdir(parents=True, exist_ok=True)
        rows = [("filename", "label")]
        for i in range(count):
            block, k = divmod(i, len(names))  # each block of images shows every action once
            order = default_rng([seed, split, block, 1]).permutation(len(names))
            rows.append((f"Image_{i + 1}.jpg", names[order[k]]))
            picture = draw_action(rows[-1][1], default_rng([seed, split, i]))
            picture.save(folder / rows[-1][0], quality=85)
            if progress:
                progress(1)
        with (out / f"{title}ing_set.csv").open("w", newline="") as file:
            csv.writer(file).writerows(row[: 2 - split] for row in rows)
    return out
