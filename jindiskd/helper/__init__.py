"""The one part that runs as root: maps volumes on the host for the service, by a closed list of verbs.

One process a connection and one request a process, started by the socket unit. The process that opened a volume for
the network block device stays as long as the volume is open, with its engine in a child that has no rights at all.
"""
