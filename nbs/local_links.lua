-- nbdev names the site's pages by their address where a text names a function: within the site they are pages beside it.
function Link(link)
  link.target = link.target:gsub('^https://cxrlg%.github%.io/cxrlg/', '')
  if link.target == '' then link.target = 'index.html' end
  return link
end
