"""The feature term: deep maps supervise shallow ones. Pure functions of maps, which know no model."""
