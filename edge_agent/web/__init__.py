"""Pages: scripts and style sheets without a build step, and what puts them into one document or serves that on this machine."""
