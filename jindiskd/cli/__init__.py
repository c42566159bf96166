"""`jindiskctl`: the command line, on top of the bus. One module a noun; the parsing is click's."""
