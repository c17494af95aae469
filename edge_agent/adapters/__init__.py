"""What becomes of adapters after their training: tried, merged with others, and handed on."""
