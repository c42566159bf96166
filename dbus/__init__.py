"""The bus contract and the files that go with it, as package data: read by `jindiskd.bus.contract`."""
