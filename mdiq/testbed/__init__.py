"""Equipment of benches and tests: slow hops, slow nodes, topologies on one machine. Nothing that serves imports it."""
