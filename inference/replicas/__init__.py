"""Several replicas of a model behind one front, which holds the clients' sockets."""
