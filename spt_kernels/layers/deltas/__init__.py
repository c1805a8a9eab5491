"""The trained values inside frozen tensors: held, written, saved and loaded, whatever the layer."""
