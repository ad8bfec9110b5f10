"""What lies around the application: connections, keys and rates, log, counters, spans."""
