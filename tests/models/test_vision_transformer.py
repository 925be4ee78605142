"""The layers of vision transformers that Keras has not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from har.models.vision_transformer import LearnedTokens, Positions, tanh_gelu


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("places", [3, 5, 11])
def test_positions_are_resized_as_tensorflow_does(places: int, antialias: bool) -> None:
    layer = Positions(25, antialias=antialias)
    found = layer(np.zeros((1, places, places + 1, 4), np.float32))[0]
    table = np.asarray(layer.table).reshape(5, 5, 4)
    wanted = tf.image.resize(table, (places, places + 1), "bicubic", antialias=antialias)
    # TensorFlow takes the weights from a table of 1,024 distances
    np.testing.assert_allclose(found, wanted, atol=5e-4)
    np.testing.assert_allclose(layer(np.zeros((1, 5, 5, 4), np.float32))[0], table, atol=1e-6)


def test_tokens_are_the_same_for_every_image() -> None:
    layer = LearnedTokens(2)
    found = np.asarray(layer(np.zeros((3, 5, 4), np.float32)))
    assert found.shape == (3, 2, 4) == layer.compute_output_shape((3, 5, 4))
    np.testing.assert_array_equal(found, np.broadcast_to(layer.get_weights()[0], (3, 2, 4)))


@pytest.mark.parametrize("layer", [LearnedTokens(2), Positions(9, antialias=True)])
def test_a_copy_draws_no_values(layer: keras.Layer) -> None:
    """What `fold_batch_norms` relies on, as with Keras' own layers."""
    config = layer.get_config()
    zeros = {name: "zeros" for name in config if name.endswith("_initializer")}
    copy = type(layer).from_config(config | zeros)
    copy(np.zeros((1, 3, 3, 4) if isinstance(layer, Positions) else (1, 3, 4), np.float32))
    assert zeros and not copy.get_weights()[0].any()


def test_gelu_is_approximated() -> None:
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    wanted = tf.nn.gelu(x, approximate=True)
    np.testing.assert_allclose(tanh_gelu(x), wanted, atol=1e-6)
    assert np.abs(wanted - tf.nn.gelu(x)).max() > 1e-4
