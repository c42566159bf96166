"""Rules for udev: which block devices carry volumes of ours."""
