"""Human action recognition from still images, as one tracked experiment."""

import os

from har.util.quiet import load_tensorflow_quietly

__version__ = "0.1.0"

# TensorFlow reads this once, while it loads. Its C++ side reports every library that it does not
# find as an error; real failures raise an exception all the same.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Here, so that it holds in every command and in every process that a command starts.
load_tensorflow_quietly()
