"""Perceptual hashes of images: alike for images that look alike.

There are two hashes of 64 bits, both by ImageHash: a difference hash (is a pixel brighter than its
neighbour) and a DCT hash (the signs of low frequencies). They stay nearly the same under another
watermark, size or compression. They change with most crops and other shots of the same scene.
"""

import imagehash
import numpy as np
from PIL import Image, ImageOps

# Each hash, and the (width, height) in grey levels that it works on.
HASHES = {imagehash.dhash: (9, 8), imagehash.phash: (32, 32)}
# The hash of a plain picture, such as a digit on black or a page of text. Plain pictures agree in
# most bits, whatever they show, so only equal bytes tell that two of them are copies.
PLAIN = ""
# Neighbours from left to right differ visibly by more grey levels. A picture is plain if too few do
# in the image of the difference hash (of 64) or of the DCT hash (of 992), or if in the first one
# nearly all of them grow brighter, or nearly all darker, as in a shade from left to right.
#
# Chosen on drawn pictures, 1,500 of each kind, and on 6,000 photographs. Without these limits,
# unrelated digits, products, icons and charts formed groups of up to 1,425. Now the largest group
# has 108, of handwritten digits. 1 % of the photographs are plain; those with near copies have at
# least 40 and 348 visible differences, and at least 18 in each direction.
VISIBLE = 2
MIN_DIFFERENCES = 38
MIN_FINE_DIFFERENCES = 320
MIN_EACH_WAY = 10


def perceptual_hash(image: Image.Image) -> str:
    """Return 64 hexadecimal digits: dhash and phash of an RGB image, then of its mirror image.

    The hash of a plain picture, which has too little to compare, is empty.
    """
    grey = image.convert("L")
    # resized here, once for the image and its mirror image: ImageHash keeps images of this size
    small = [(each, grey.resize(size, Image.Resampling.LANCZOS)) for each, size in HASHES.items()]
    if _is_plain(*(picture for _, picture in small)):
        return PLAIN
    mirrored = [(hashed, ImageOps.mirror(picture)) for hashed, picture in small]
    bits = [hashed(picture).hash for hashed, picture in small + mirrored]
    # the digits that ImageHash prints, without its Python loop over the bits
    return np.packbits(bits).tobytes().hex()


def _is_plain(for_dhash: Image.Image, for_phash: Image.Image) -> bool:
    coarse, fine = (np.diff(np.asarray(each, np.int16), axis=1) for each in (for_dhash, for_phash))
    brighter, darker = int((coarse > VISIBLE).sum()), int((coarse < -VISIBLE).sum())
    return (
        brighter + darker < MIN_DIFFERENCES
        or min(brighter, darker) < MIN_EACH_WAY
        or int((np.abs(fine) > VISIBLE).sum()) < MIN_FINE_DIFFERENCES
    )
