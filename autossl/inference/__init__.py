"""From images to label maps: tiles, predictor, back to the original grid."""
