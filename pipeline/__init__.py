"""What exists already, what runs next, and where: experiment file, graph, store, engines, runs, command line."""
