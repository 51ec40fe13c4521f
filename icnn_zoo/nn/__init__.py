"""The irregular convolution as a layer, and what layers of other libraries do."""
