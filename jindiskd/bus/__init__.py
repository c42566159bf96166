"""The D-Bus side: connection, contract, dispatch, authorisation and the objects themselves."""
