"""An import in parts, each of which any process of any machine can make."""
