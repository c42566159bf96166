"""Units and their companions, as package data: put in place by `jindiskd.system_files`."""
