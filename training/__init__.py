"""Training of wan-shapes, the bundled model: its world, its two training runs, its evaluation. No part of the service."""
