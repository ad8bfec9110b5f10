"""Work shared among threads, processes and machines: parts of it, its pieces, engines that run them."""
