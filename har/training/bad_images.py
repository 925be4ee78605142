"""Names the image that a loader failed at, because TensorFlow does not always."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf

from har.data.images import ImageError, decode_rgb, read_image
from har.data.manifest import Manifest, check_images
from har.util.errors import UserError
from har.util.files import storable


@contextmanager
def name_bad_images(manifest: Manifest) -> Iterator[None]:
    """Turn TensorFlow's error about an image into a UserError with its name and the reason."""
    try:
        yield
    except tf.errors.ResourceExhaustedError:
        raise
    except tf.errors.OpError as error:
        if found := find_bad_image(manifest):
            raise found from error
        raise


def find_bad_image(manifest: Manifest) -> UserError | None:
    """Find an image that is gone, changed or cannot be decoded; this reads every image."""
    try:
        check_images(manifest)
        for path, plain in zip(manifest.table["path"], manifest.table["plain_jpeg"], strict=True):
            _check_decoders(manifest.root / path, manifest.root, plain)
    except UserError as error:
        return error
    return None


def _check_decoders(file: Path, root: Path, plain: bool) -> None:
    """Raise a UserError if the decoder that `decode_in_graph` takes cannot read an image."""
    try:
        data = read_image(file, inside=root)
        pixels = decode_rgb(data)
        if plain and not _decodes_in_tensorflow(data, pixels.shape):
            raise ImageError("TensorFlow cannot decode it")
    except ImageError as error:
        raise UserError(
            f"{storable(str(file))}: {error}: run `har prepare` again, which leaves it out or lets"
            " another decoder read it"
        ) from error


def _decodes_in_tensorflow(data: bytes, shape: tuple[int, ...]) -> bool:
    try:
        # it also reads other kinds, but to other shapes
        return tuple(tf.io.decode_jpeg(data, channels=3).shape) == shape
    except tf.errors.OpError:
        return False
