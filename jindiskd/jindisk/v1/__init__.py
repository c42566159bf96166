"""JinDisk 1: the volume format of the reference kernel module (`dm-jindisk`), byte-compatible, for interchange.

**This format protects nothing against whoever holds the disk.** Its metadata is in clear, with the keys of all data in
it: the volume can be read, changed and set back without the root key. It is here to read volumes that exist, to write
volumes for the module, and to migrate; put a volume of it inside something that does encrypt and authenticate.
`docs/formats/jindisk1.md` has the layout and the argument; section numbers in this package are of that page.
"""
