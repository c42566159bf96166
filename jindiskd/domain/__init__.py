"""libvirt domains: XML, connection, launch."""
