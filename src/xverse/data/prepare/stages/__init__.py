"""The stages of document processing: one module each, with a pure function of one text."""
