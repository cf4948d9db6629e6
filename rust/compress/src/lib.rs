//! Expert matrices and checkpoint folders: align, cluster, merge, prune, stream.
