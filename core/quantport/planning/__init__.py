"""Plans: pure. Which kernel each layer gets on a device, with every reason, before any weight is read."""
