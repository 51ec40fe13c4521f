"""Files, images, label pictures and downloads."""
