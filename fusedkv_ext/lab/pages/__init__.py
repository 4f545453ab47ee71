"""Generated parts of the documents, one module per document."""
