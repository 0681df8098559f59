"""Results as HTML pages, tables and model cards."""
