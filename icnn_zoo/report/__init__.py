"""One page that shows a network: scores, curves, predictions, heatmaps and shapes."""
