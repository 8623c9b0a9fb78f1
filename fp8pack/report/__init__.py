"""Results as a person reads them, in a terminal. Facts are drawn here, never computed."""
