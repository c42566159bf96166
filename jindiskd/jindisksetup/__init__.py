"""`jindisksetup`: JinDisk volumes in files and block devices, without the service."""
