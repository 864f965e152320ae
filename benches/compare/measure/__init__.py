"""The measurements, one module for each figure. Functions take the Bench; results that several rows need are cached."""
