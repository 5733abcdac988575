"""SAEs, transcoders and cross-layer transcoders."""
