"""Stage trace: the IR of the uncompressed model, traced once. The product and its twin are this graph, repacked."""
