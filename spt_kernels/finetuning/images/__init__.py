"""Images on disk, in folders, lists or data sets' own layouts, as batches of tensors."""
