"""Icon sets in Iconify's format, and scenes composed of their drawings, with a scorer."""
