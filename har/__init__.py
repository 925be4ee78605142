"""Human action recognition from still images, as one tracked experiment."""

import os

__version__ = "0.1.0"

# TensorFlow reads this once, while it loads. Its C++ side reports every library it did not
# find as an error; what really goes wrong reaches us as an exception all the same.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
